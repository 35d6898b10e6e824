"""Pages for a browser, made of a run's files: one run, several runs beside each other, a pipeline.

A page is a single file and needs no network. Texts of models and strangers stay text, never markup:
templates escape everything, and the page's policy lets no other style or script in than its own.
"""
