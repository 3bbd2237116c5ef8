"""A recipe file and its overrides become one frozen `Run`. Imports no torch."""
