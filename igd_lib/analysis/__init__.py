"""Measures, result rows, statistics, tables and figures."""
