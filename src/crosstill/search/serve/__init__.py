"""The search box over HTTP: JSON routes, photos by id, and a page."""
