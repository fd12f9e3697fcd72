"""What the site needs beside its pages: the API reference, and links that leave this directory.

The pages are read on a code host too, where `../tpad_jax/config.py` is a file of the checkout. In
the site a module is its page of the reference, a file of PAGES a page, and any other file is
copied. mkdocs checks the links that come of it.
"""

import ast
import functools
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {'benchmarks/RESULTS.md': 'benchmarks.md', 'CHANGELOG.md': 'changelog.md'}
LINK = re.compile(r'(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))')  # ](path#anchor), of no scheme


def on_config(config):
    """Adds what the navigation does not name."""
    named = set(_pages(config.nav))
    more = [name for name in sorted(path.name for path in Path(config.docs_dir).glob('*.md'))
            if name not in named]
    systems = sorted(f'systems/{path.name}' for path in Path(config.docs_dir, 'systems').iterdir())
    config.nav = [*config.nav, *more, {'Systems': systems}, {'Measured': 'benchmarks.md'},
                  'changelog.md', {'API reference': ['api/index.md', *_tree(_modules())]}]
    return config


def on_files(files, config):
    """Adds the page of every module, the results and the files that pages link to."""
    modules = _modules()
    made = {page(name): f'# {name}\n\n::: {name}\n' for name in modules}
    made['api/index.md'] = '# API reference\n\n' + '\n'.join(
        f'- [{name}]({page(name).removeprefix("api/")}): {says}'
        for name, says in modules.items()) + '\n'
    made |= {own: (ROOT / name).read_text() for name, own in PAGES.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for name in sorted({name for file in files.documentation_pages()
                        for name in _leaving(file.src_uri, file.content_string)
                        if _target(name) == copy(name)}):
        files.append(File.generated(config, copy(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links that leave the directory into links inside the site."""
    del config, files

    def turned(found):
        name = _inside_checkout(page.file.src_uri, found[2])
        if name is None:
            return found[0]
        up = '../' * page.file.src_uri.count('/')
        return found[1] + up + _target(name) + found[3]
    return LINK.sub(turned, markdown)


def page(module: str) -> str:
    """The page of a module: tpad_jax.nn.linear -> api/tpad_jax.nn.linear.md."""
    return f'api/{module}.md'


def copy(name: str) -> str:
    """Where a file of the checkout lies in the site; a browser shows no .py, but downloads it."""
    return f'files/{name}' + '.txt' * name.endswith('.py')


def _target(name):
    if name in PAGES:
        return PAGES[name]
    if name.startswith('docs/'):
        return name.removeprefix('docs/')
    module = _module(PurePosixPath(name))
    return page(module) if module in _modules() else copy(name)


def _inside_checkout(source, link):
    """The path in the checkout that a page's link leads to if that is no path of the site."""
    outside = {own: name for name, own in PAGES.items()}.get(source)
    own = PurePosixPath(outside or f'docs/{source}')
    parts = []
    for part in (own.parent / link).parts:
        if part == '..' and parts:
            parts.pop()
        else:
            parts.append(part)
    name = '/'.join(parts)
    return name if (outside or not name.startswith('docs/')) and (ROOT / name).is_file() else None


def _leaving(source, markdown):
    found = (_inside_checkout(source, match[2]) for match in LINK.finditer(markdown))
    return {name for name in found if name}


@functools.cache
def _modules():
    """{module: the first line of its docstring}."""
    found = {}
    for path in sorted(ROOT.glob('tpad_jax/**/*.py')):
        module = _module(PurePosixPath(path.relative_to(ROOT).as_posix()))
        if not module.endswith('__main__'):
            found[module] = (ast.get_docstring(ast.parse(path.read_text())) or '').split('\n')[0]
    return dict(sorted(found.items()))


def _module(path):
    return '.'.join(path.with_suffix('').parts).removesuffix('.__init__')


def _tree(modules):
    """The navigation: a package's pages under its name."""
    packages = [name for name in modules if any(other.startswith(name + '.') for other in modules)]
    return [page('tpad_jax'), *(
        {name: page(name)} for name in modules
        if name.count('.') == 1 and name not in packages), *(
        {package: [page(package), *({name: page(name)} for name in modules
                                    if name.rpartition('.')[0] == package
                                    and name not in packages)]}
        for package in packages if package != 'tpad_jax')]


def _pages(nav):
    for entry in nav:
        if isinstance(entry, dict):
            for value in entry.values():
                yield from _pages(value if isinstance(value, list) else [value])
        else:
            yield entry
