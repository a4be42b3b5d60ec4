"""The report of a run, and of several beside each other: one offline HTML file."""
