"""States, shutdown and queues of a FakeEngine: the tests of the real ones."""

from __future__ import annotations

import pytest

from tests.engine import test_batch_admission, test_many, test_shutdown
from tests.testing.rigged_fake import FAKES, borrowed

pytestmark = pytest.mark.anyio

globals().update(FAKES)
globals().update(
    borrowed(
        test_shutdown,
        # These are about loading a real model, and letting go of it.
        "test_a_start_that_waits_for_another_hears_of_its_failure",
        "test_stop_while_loading_ends_the_load_at_once",
        "test_loading_reports_progress_in_the_event_loop",
        "test_the_model_is_dropped_by_stop_on_the_mlx_thread",
        "test_a_forgotten_engine_warns_and_drops_its_model_on_the_mlx_thread",
        "test_a_loop_that_ends_during_a_shutdown_leaves_no_model",
        "test_a_start_whose_loop_was_closed_does_not_block_the_next",
        "test_stop_while_a_failed_start_cleans_up",
    )
)
globals().update(
    borrowed(
        test_many,
        "test_results_come_in_order_and_each_failure_is_its_own",  # has processors
    )
)
globals().update(
    {
        f"{name}_in_a_batch": test
        for name, test in borrowed(
            test_batch_admission,
            # These are about memory, or compare the real ones.
            "test_a_priority_must_be_an_integer_and_means_nothing_to_a_simple_engine",
            "test_a_request_that_can_never_fit_is_refused_at_once_with_both_numbers",
            "test_a_request_that_does_not_fit_now_waits_and_stored_prompts_give_way",
            "test_waiting_for_memory_is_not_busy_waiting",
        ).items()
    }
)
