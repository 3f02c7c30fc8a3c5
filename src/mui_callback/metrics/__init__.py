"""Pure functions from counts to metrics, and the one catalogue of all of them."""
