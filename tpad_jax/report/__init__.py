"""The page of a run, one file for a browser, and a page that compares several runs.

`gallery` stores what only a running job knows, and draws it as a contact sheet. `stored` reads a
workdir. `curves` draws charts. `page` fills the templates.
"""
