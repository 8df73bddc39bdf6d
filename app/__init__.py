"""Everything that reads a stored run: command line, dashboard, figures."""
