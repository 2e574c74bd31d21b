"""Tables and plots of plans. matplotlib (the extra `report`) is imported when a plot is made, not before."""
