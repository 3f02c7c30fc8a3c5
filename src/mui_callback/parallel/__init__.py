"""Several processes that train one model: how they agree, what they share out, what they send each other."""
