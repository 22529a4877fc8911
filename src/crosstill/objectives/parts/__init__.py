"""Code that several losses share; no loss is in here."""
