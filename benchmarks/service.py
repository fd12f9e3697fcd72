"""The HTTP service under load, and stopped while it is loaded: `python -m benchmarks.service`.

    python -m benchmarks.service --run=runs/amazon --seconds=20 --json=FILE

Needs `wrk`, which drives it from a process of its own: one session of five items a request. Then
clients of this program ask without a pause, the service gets a SIGTERM among them, and every
request it accepted has to have reached its client whole.
"""

import argparse
import datetime
import http.client
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.checkout import ROOT, commit

CLIENTS = 16
LUA = '''
local file = io.open('{file}')
local bodies = {{}}
for line in file:lines() do bodies[#bodies + 1] = line end
local n = 0
request = function()
  n = n % #bodies + 1
  return wrk.format('POST', '/recommend', {{['Content-Type'] = 'application/json'}}, bodies[n])
end
done = function(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format('%d %d %f %f %f %d', summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency.max,
    e.connect + e.read + e.write + e.status + e.timeout))
end
'''


def started(run, *flags):
    """The service in a process of its own and its port, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'tpad_jax.serve', str(run), '--port', '0', *flags], cwd=ROOT,
        stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        found = re.search(r'http://[\d.]+:(\d+)', line)
        if found:
            return process, int(found[1])
    sys.exit(f'the service ended with status {process.wait()}')


def loaded(port, bodies, seconds, connections):
    """What wrk measured."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / 'bodies').write_text('\n'.join(bodies) + '\n')
        script = Path(scratch) / 'script.lua'
        script.write_text(LUA.format(file=Path(scratch) / 'bodies'))
        done = subprocess.run(
            ['wrk', '-t1', f'-c{connections}', f'-d{seconds}s', '--timeout', '10s', '-s',
             str(script), f'http://127.0.0.1:{port}'], capture_output=True, text=True, check=True)
    requests, micros, half, most, worst, errors = map(float, done.stderr.split())
    return {'connections': connections, 'requests': int(requests), 'errors': int(errors),
            'requests per second': round(requests / micros * 1e6, 1),
            'p50 ms': round(half / 1e3, 2), 'p99 ms': round(most / 1e3, 2),
            'max ms': round(worst / 1e3, 2)}


def asking(port, bodies, stop, count):
    """Ask until nobody listens; a request without a whole answer is `lost` if it was taken."""
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    n = 0
    while not stop.is_set():
        n += 1
        try:
            link.request('POST', '/recommend', bodies[n % len(bodies)],
                         {'Content-Type': 'application/json'})
            answer = link.getresponse()
            json.loads(answer.read())
            count[answer.status] = count.get(answer.status, 0) + 1
        except (OSError, http.client.HTTPException):
            link.close()
            count['refused'] = count.get('refused', 0) + 1
            stop.wait(0.05)
    link.close()


def stopped(process, port, bodies):
    """A SIGTERM among requests: what clients got, and what the service says it took."""
    stop, counts = threading.Event(), [{} for _ in range(CLIENTS)]
    threads = [threading.Thread(target=asking, args=(port, bodies, stop, own)) for own in counts]
    for thread in threads:
        thread.start()
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    status, told = ended(process)
    stop.set()
    for thread in threads:
        thread.join()
    accepted, answered = map(int, re.search(r'(\d+) requests accepted, (\d+) ans', told).groups())
    received = {str(code): sum(own.get(code, 0) for own in counts)
                for code in {code for own in counts for code in own}}
    whole = sum(n for code, n in received.items() if code != 'refused')
    return {'exit status': status, 'accepted': accepted, 'answered': answered,
            'received': received, 'lost': accepted - whole}


def ended(process):
    """Wait for its end: exit status and what it said."""
    _, told = process.communicate()
    return process.returncode, told


def main():
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--run', type=Path, required=True, help='workdir of a finished run')
    parser.add_argument('--seconds', type=int, default=20)
    parser.add_argument('--json', type=Path)
    given = parser.parse_args()
    if shutil.which('wrk') is None:
        sys.exit('wrk is not installed: apt install wrk')
    import tpad_jax

    ids = tpad_jax.load(given.run).ids[1:]
    bodies = [json.dumps({'sessions': [[ids[(7 * n + 11 * j) % len(ids)] for j in range(5)]]})
              for n in range(500)]
    out = {'commit': commit('tpad_jax'), 'date': datetime.date.today().isoformat(),
           'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'items': len(ids),
           'load average': [round(os.getloadavg()[0], 1)]}
    process, port = started(given.run)
    loaded(port, bodies, 3, 8)  # so that nothing is met for the first time
    out['load'] = [loaded(port, bodies, given.seconds, n) for n in (1, 32)]
    # before the stop, for its own account begins with the process
    process.send_signal(signal.SIGTERM)
    status, told = ended(process)
    if status:
        sys.exit(f'the service ended with status {status}: {told}')
    out['stop'] = stopped(*started(given.run), bodies)
    process, port = started(given.run, '--waiting', '8')
    out['overload'] = loaded(port, bodies, 5, 64)
    process.send_signal(signal.SIGTERM)
    ended(process)
    out['load average'].append(round(os.getloadavg()[0], 1))
    print(json.dumps(out, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    main()
