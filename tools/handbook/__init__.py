"""Pages of the handbook that are made from the code when it is built, so that they cannot fall behind it."""
