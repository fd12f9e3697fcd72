"""Whether the tests notice a fault: `python -m benchmarks.mutations [NAME ...]`.

The table below holds faults that people make. The command copies the files under version control
and first runs all the tests named here on that copy: they have to pass. Then it puts in one fault,
runs the test that should notice it, and puts the file back. If that test fails, the fault is
caught; if it passes, the fault is missed.

Every outcome goes at once into `benchmarks/mutations.json` with its commit and date. The exit
status is 1 if a fault was missed. Given names, the command tries only these faults.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from absl import app
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.checkout import commit
from tpad_jax.core import files

ROOT, KEPT = Path(__file__).parents[1], Path(__file__).with_suffix('.json')
PYTEST = (sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-q', '-m',
          'slow or not slow', '-x')
PASSED, FAILED = 0, 1  # pytest's exit statuses; any other means that the tests did not run


@dataclass(frozen=True)
class Fault:
    """One deliberate fault.

    Attributes:
      name: of the fault. path: of the file, from the root of the tree.
      old: a snippet that the file holds exactly once. new: what replaces it.
      test: the pytest node that should fail.
    """

    name: str
    path: str
    old: str
    new: str
    test: str


FAULTS = (
    # losses
    Fault('infonce_sign', 'tpad_jax/mutual_information/bounds.py',
          'jnp.logaddexp(own, rest) + jnp.log(count + 1.0)',
          'jnp.logaddexp(own, rest) - jnp.log(count + 1.0)',
          'tests/losses/test_losses.py::test_value_against_numpy[np_infonce]'),
    Fault('duplicates_are_negatives', 'tpad_jax/losses/pairs.py',
          '(item != at.everyone) & (own // width != row)', 'own // width != row',
          'tests/mutual_information/test_bounds.py::test_equal_items_are_never_negatives'),
    Fault('vclub_trains_q', 'tpad_jax/losses/information.py',
          'q = jax.lax.stop_gradient(out[club])\n    factors =', 'q = out[club]\n    factors =',
          'tests/mutual_information/test_bounds.py::test_vclub_stops_pulling_where_its_estimate_is_negative'),
    Fault('cold_items_are_negatives', 'tpad_jax/losses/recommendation.py',
          'log_partition(h, z, warm,', 'log_partition(h, z, jnp.arange(len(z)) > 0,',
          'tests/losses/test_losses.py::test_cold_items_are_no_negatives_of_the_next_item'),
    Fault('combine_ignores_valid', 'tpad_jax/losses/combine.py',
          'w = jnp.where(valid, w, 0)', 'w = 1.0 * w',
          'tests/losses/test_combine.py::test_combine_averages_weighs_logs_and_carries_state'),
    Fault('combine_ignores_weights', 'tpad_jax/losses/combine.py',
          'total += weight * logged[name]', 'total += logged[name]',
          'tests/losses/test_combine.py::test_combine_averages_weighs_logs_and_carries_state'),
    # models
    Fault('attention_sees_the_future', 'tpad_jax/nn/attention.py',
          'jnp.tril(jnp.ones((x.shape[1],) * 2, bool))', 'jnp.ones((x.shape[1],) * 2, bool)',
          'tests/models/test_models.py::test_a_transformer_sees_what_came_before_only'),
    Fault('gnn_edges_reversed', 'tpad_jax/models/sessions/sr_gnn.py',
          'jnp.concatenate([back, forth], axis=1)', 'jnp.concatenate([forth, back], axis=1)',
          'tests/models/sessions/test_sr_gnn.py::test_network_against_the_equations'),
    Fault('lora_without_scale', 'tpad_jax/nn/linear.py',
          "w * scale if p[-1] == 'b' else w", 'w',
          'tests/models/test_models.py::'
          'test_a_fresh_adapter_is_nothing_and_a_trained_one_is_a_change_of_the_kernels'),
    Fault('draws_by_place', 'tpad_jax/nn/attention.py',
          'jax.vmap(jax.random.fold_in, (None, 0))(key, rows)',
          'jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(rows)))',
          'tests/models/test_models.py::test_evaluation_is_deterministic_and_draws_go_with_the_row'),
    Fault('knn_ignores_recency', 'tpad_jax/baselines/neighbours.py',
          'similar *= np.exp((session - latest[owner]) / (sessions * lambda2))', 'pass',
          'tests/baselines/test_neighbours.py::'
          'test_a_recent_session_weighs_more_and_an_old_one_is_not_sampled'),
    # training
    Fault('no_warm_up', 'tpad_jax/training/optimizer.py',
          'warmup = round(stage.warmup * stage.steps)', 'warmup = round(stage.warmup)',
          'tests/training/test_optimizer.py::'
          'test_the_rate_rises_over_the_warm_up_and_falls_to_nothing_at_the_last_step'),
    Fault('gradient_of_one_replica', 'tpad_jax/training/step.py',
          '    grads = collectives.mean(grads, axis)\n', '',
          'tests/training/test_step.py::'
          'test_predictions_after_every_position_are_the_same_on_eight_devices'),
    Fault('resume_without_loss_state', 'tpad_jax/training/loop.py',
          "state, catalogue = saved['state'], {",
          "state, catalogue = saved['state'].replace(loss_state=state.loss_state), {",
          'tests/training/test_step.py::test_a_resumed_stage_has_the_loss_state_it_was_stopped_with'),
    Fault('damage_is_not_noticed', 'tpad_jax/training/checkpoint.py',
          'if found[name] != checksum:', 'if False:',
          'tests/training/test_damaged_checkpoints.py::'
          'test_damage_to_any_file_of_the_newest_is_reported_and_the_one_before_is_used[flip]'),
    Fault('two_runs_in_a_workdir', 'tpad_jax/training/workdir.py',
          'fcntl.LOCK_EX | fcntl.LOCK_NB', 'fcntl.LOCK_SH | fcntl.LOCK_NB',
          'tests/training/test_workdir.py::'
          'test_a_second_run_in_a_workdir_is_refused_until_the_first_ends'),
    Fault('inputs_are_compared_by_path', 'tpad_jax/training/workdir.py',
          "flat[key] = f'content {content}'", "flat[key] += f' content {content}'",
          'tests/training/test_workdir.py::'
          'test_an_input_may_move_but_its_content_may_not_change[mllm.base]'),
    Fault('seconds_without_the_last_save', 'tpad_jax/training/loop.py',
          "        record['seconds'] = time.perf_counter() - begun  # with the last save, as in "
          '`spent`\n', '',
          'tests/training/test_step.py::test_the_loop_says_what_its_seconds_went_to[True]'),
    Fault('patterns_are_checked_late', 'tpad_jax/job/job.py',
          '        self._check_patterns(stages)\n        if c.mllm.checkpoint:',
          '        if c.mllm.checkpoint:',
          'tests/job/test_faults.py::'
          'test_what_fits_no_parameter_is_refused_before_any_stage[train]'),
    Fault('features_of_another_model', 'tpad_jax/features/store.py',
          "**about['fingerprint']}", '}',
          'tests/features/test_store.py::test_other_features_are_refused_by_the_keys_that_differ'),
    Fault('damaged_parts_are_joined', 'tpad_jax/features/store.py',
          'return rows if fits and end == _mark(rows, about) else None', 'return rows',
          'tests/features/test_store.py::test_a_damaged_part_is_made_again_and_reported'),
    Fault('parts_of_a_lost_host_stay', 'tpad_jax/features/leases.py',
          'if idle <= self._seconds and not self._has_ended(holder):', 'if True:',
          'tests/features/test_store.py::test_a_process_that_was_taken_for_lost_ends_as_well[makes]'),
    # data
    Fault('target_in_the_prefix', 'tpad_jax/data/sessions.py',
          'valid = where < stop[:, None]', 'valid = where <= stop[:, None]',
          'tests/test_traps.py::test_a_prefix_keeps_its_last_items_and_never_its_target'),
    Fault('split_not_by_time', 'tpad_jax/data/sessions.py',
          'tuple(_between(sessions, *pair)',
          'tuple(_between(take(sessions, np.random.default_rng(0).permutation(total)), *pair)',
          'tests/data/test_sessions.py::test_split_shares_counts_and_order'),
    Fault('k_core_of_all_sessions', 'tpad_jax/data/sources/amazon_tables.py',
          "parts = sessions_lib.split(sessions, options['valid'], options['test'])",
          "parts = sessions_lib.split(sessions_lib.k_core(sessions, options['core'], shortest), "
          "options['valid'], options['test'])",
          'tests/test_traps.py::test_no_table_is_counted_on_test'),
    Fault('price_ends_at_the_comma', 'tpad_jax/data/sources/amazon_fields.py',
          "return float(number.replace(',', ''))", "return float(number.split(',')[0])",
          'tests/data/sources/test_amazon.py::test_2018_quirks'),
    Fault('links_out_are_followed', 'tpad_jax/data/untrusted.py',
          'path.resolve().is_relative_to(folder.resolve())',
          'path.absolute().is_relative_to(folder.absolute())',
          'tests/data/test_links.py::test_a_link_out_of_the_folder_is_refused'),
    # ranking and service
    Fault('padding_is_ranked', 'tpad_jax/evaluation/scorers.py',
          'jnp.maximum(k * chunk, 1)', 'k * chunk',
          'tests/evaluation/test_device_ranks.py::test_counts_of_the_whole_catalogue'),
    Fault('ties_are_won', 'tpad_jax/core/ties.py',
          'return (until[np.minimum(above + equal, k)] - until[np.minimum(above, k)]) / equal',
          'return until[np.minimum(above + 1, k)] - until[np.minimum(above, k)]',
          'tests/evaluation/test_metrics.py::test_a_tied_target_counts_as_the_mean_over_all_orders'),
    Fault('top_k_ties_by_score_of_group', 'tpad_jax/serving/topk.py',
          'jnp.sort(chosen, axis=1)[:, :, None]', 'chosen[:, :, None]',
          'tests/serving/test_recommender.py::test_top_k_is_exact_and_ties_go_by_item'),
    Fault('bootstrap_of_rows', 'tpad_jax/job/results.py',
          'session = np.unique(rows.session, return_inverse=True)[1]',
          'session = np.arange(len(rows.session))',
          'tests/evaluation/test_compare.py::test_intervals_of_a_result'),
    Fault('body_limit_by_part', 'tpad_jax/serving/http.py',
          "size += len(message.get('body', b''))", "size = len(message.get('body', b''))",
          'tests/serving/test_http.py::'
          'test_a_body_that_does_not_say_its_length_is_counted_as_it_comes'),
)


def copy(target: Path) -> None:
    """Copy the files under version control, as they are now."""
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).is_file():  # not one that was deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run(tree: Path, *tests: str) -> tuple[int, float]:
    """Run tests of a tree.

    Returns:
      pytest's exit status, PASSED or FAILED, and the seconds.
    """
    # without bytecode: Python would not see a file change twice in one second
    env = {**os.environ, 'PYTHONPATH': str(tree), 'PYTHONDONTWRITEBYTECODE': '1'}
    begun = time.perf_counter()
    done = subprocess.run([*PYTEST, *tests], cwd=tree, env=env, capture_output=True, text=True,
                          check=False)
    if done.returncode not in (PASSED, FAILED):
        sys.exit(f'{" ".join(tests)}: pytest left with {done.returncode}\n'
                 f'{done.stdout[-3000:]}{done.stderr[-1000:]}')
    return done.returncode, time.perf_counter() - begun


def outcome(tree: Path, fault: Fault) -> tuple[str, float]:
    """'caught' or 'missed', and the seconds of the test."""
    file = tree / fault.path
    whole = file.read_text()
    if (count := whole.count(fault.old)) != 1:
        sys.exit(f'{fault.name}: {fault.path} holds {fault.old!r} {count} times and not once')
    file.write_text(whole.replace(fault.old, fault.new))
    try:
        status, seconds = run(tree, fault.test)
    finally:
        file.write_text(whole)
    return 'caught' if status == FAILED else 'missed', seconds


def main(argv):
    """Try the faults, print the table, write the JSON."""
    known = {fault.name: fault for fault in FAULTS}
    if unknown := sorted(set(argv[1:]) - known.keys()):
        sys.exit(f'no fault {", ".join(unknown)}; there are {", ".join(known)}')
    chosen = [known[name] for name in argv[1:]] or list(FAULTS)
    before = json.loads(KEPT.read_text())['faults'] if KEPT.is_file() else {}
    cells = {name: before[name] for name in known if name in before}
    table = Table(title_justify='left', box=None)
    for head in ('fault', 'file', 'test', 'outcome', 'seconds'):
        table.add_column(head, justify='right' if head == 'seconds' else 'left', overflow='fold')
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy(tree)
        status, seconds = run(tree, *dict.fromkeys(fault.test for fault in chosen))
        if status != PASSED:
            sys.exit('a test fails without any fault; mend it first')
        print(f'all tests pass without a fault, {seconds:.0f} s', flush=True)
        for fault in chosen:
            found, seconds = outcome(tree, fault)
            print(f'{found}  {fault.name}', flush=True)
            table.add_row(fault.name, fault.path, escape(fault.test), found, f'{seconds:.1f}')
            cells[fault.name] = {
                'file': fault.path, 'test': fault.test, 'outcome': found, 'seconds': seconds,
                'commit': commit(), 'date': datetime.now(UTC).isoformat(timespec='seconds')}
            files.write_json(KEPT, {'faults': cells})
    Console(width=160).print(table)
    caught = sum(cells[fault.name]['outcome'] == 'caught' for fault in chosen)
    print(f'{caught} of {len(chosen)} faults caught')
    sys.exit(caught < len(chosen))


if __name__ == '__main__':
    app.run(main)
