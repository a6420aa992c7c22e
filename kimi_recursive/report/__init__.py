"""`results/report.html`: all that the records in `results/` say, in one self-contained file."""
