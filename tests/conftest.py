"""Settings for all tests: quiet bars, one thread, `slow` tests only when asked for (`adflow test --slow`)."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TQDM_DISABLE', '1')

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes long; run with ADFLOW_SLOW=1 or adflow test --slow')


def pytest_collection_modifyitems(config, items):
    slow = {item.path for item in items if 'slow' in item.keywords}
    items.sort(key=lambda item: item.path not in slow)       # the long files first: two workers end together
    if os.environ.get('ADFLOW_SLOW') or 'slow' in (config.getoption('-m') or ''): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow; adflow test --slow runs it'))
