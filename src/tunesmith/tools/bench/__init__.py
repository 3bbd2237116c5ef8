"""How fast a recipe trains, measured on the loop of `train` itself."""
