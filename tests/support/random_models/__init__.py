"""Random models, each step of which has a gradient that plain torch knows; ``tests/fuzz`` runs them."""
