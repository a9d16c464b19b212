"""The experiment: arms by seeds, one run each, statistics, plots and a page."""
