"""How fast a recipe trains, measured by the loop of `train` itself: nothing here runs a step of its own."""
