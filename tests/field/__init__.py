"""Situations of the field: what users do to models, batches and calls, held to eager or to an error."""
