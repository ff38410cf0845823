"""The report of a run: report.html with its plots. `report.write` writes it."""
