"""The page of a run, one file for a browser, and a page that lays several runs side by side.

`gallery` is what a run stores for it, `stored` reads a workdir, `curves` and `charts` draw,
`sections`, `page` and `comparison` say what stands where, `values` marks every figure by where in
results.json it stands.
"""
