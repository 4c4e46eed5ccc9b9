"""Score samples of any generative model: FID, sFID, Inception Score, precision, recall and more."""
