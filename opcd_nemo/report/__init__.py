"""Pages for a browser, made of a run's files: one run, several runs beside each other, a pipeline.

A page is one file without a network. What models and strangers wrote is text in it, never markup:
templates escape everything, and the page's policy lets no other style or script in than its own.
"""
