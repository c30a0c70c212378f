"""From a recipe to a report: phases, export, measurements, report page."""
