"""One page about an adapter: what it is, what it does, and what that costs."""

from .contents import ReportContents, collect_report
from .page import render_report, save_page, write_report, write_short_form

__all__ = ["ReportContents", "collect_report", "render_report", "save_page", "write_report", "write_short_form"]
