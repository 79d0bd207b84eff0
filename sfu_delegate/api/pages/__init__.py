"""The page: what operators see of a running daemon in a browser, at the admin listener.

It must never change anything: what it shows is what `admin.Questions` answers. It works without scripts; with them it brings itself up to date.
"""

from sfu_delegate.api.pages.views import PATHS, error_form, page_routes

__all__ = ["PATHS", "error_form", "page_routes"]
