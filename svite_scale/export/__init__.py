"""A run's model in files that others can use: one folder per export, in one of several forms.

:mod:`~svite_scale.export.form` says what a form is, and :mod:`~svite_scale.export.read` holds the table of them.
"""
