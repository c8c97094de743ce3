"""What people and programs see: each report is shown as tables (rich), as JSON or as names, one a line."""
