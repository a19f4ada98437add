"""How two final answers are compared: their text, their structure, their numbers, their algebra.

Nothing here bounds time or memory against hostile texts beyond its own limits: `compare` runs in
the checker's child process.
"""
