"""The page of a run, one file for a browser, and a page that compares several runs.

`gallery` stores what only a running job knows. `stored` reads a workdir. `curves` and `charts`
draw. `page` and `comparison` fill the templates. `contact_sheet` draws the gallery as a picture.
"""
