"""The paper's four tables at laptop scale: the plan of the runs, the runs and their statistics.

Also the figures that the paper published, and the page and plot that show both.
"""
