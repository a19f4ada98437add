"""Training data: rows of files and data sets become problems, and problems become the requests of
each step."""
