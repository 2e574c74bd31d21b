"""What people look at: text, tables, plots, the page of a run. matplotlib is imported only when a plot is made."""
