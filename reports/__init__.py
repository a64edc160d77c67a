"""Reports: a run folder becomes HTML, figures and tables. Imports neither torch nor visor."""
