"""Benchmarks: one question a module, one CSV row type, plots and tables read only the CSV."""
