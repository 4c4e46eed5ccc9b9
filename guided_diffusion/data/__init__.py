"""Images on disk: finding them and their classes, reading, cropping, and making batches for each process."""
