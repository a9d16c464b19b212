"""The rules: how each backward operator runs on k rows. Importing a module registers its rules."""
