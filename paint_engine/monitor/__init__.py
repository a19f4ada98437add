"""What a training run records and shows: metrics and samples on disk, the console display, the time
of each part."""
