"""A report of benches' documents: one page of HTML, its pictures, or plain text."""
