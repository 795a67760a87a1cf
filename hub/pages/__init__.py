"""The gateway's pages for browsers.

A page is a fixed function of three things: its template, which is a constant of the installation; what members declared
themselves (names, specifications of jobs, who submitted them and when); and bodies that the `Door` built and charged,
decoded from the very bytes that a client would have got. So a page says nothing that was not charged. Docs: docs/pages.md.
"""
