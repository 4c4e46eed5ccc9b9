"""Training: losses, the loop, precision, memory, averages of the weights, and saving."""
