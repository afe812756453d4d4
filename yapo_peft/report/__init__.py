"""HTML reports about adapters: properties, effects and side effects."""

from .contents import ReportContents, collect_report
from .page import render_report, save_page, write_report, write_short_form

__all__ = ["ReportContents", "collect_report", "render_report", "save_page", "write_report", "write_short_form"]
