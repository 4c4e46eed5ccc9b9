"""Files of weights: reading and writing them, knowing what they are, saves of training runs."""
