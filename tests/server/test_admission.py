"""Bounds of the requests that the engine has."""

import pytest

from nanovllm.server.admission import AdmissionControl
from nanovllm.server.errors import ApiError


def refusal(admission, num_samples=1):
    with pytest.raises(ApiError) as caught, admission.enter(num_samples):
        pass
    return caught.value


def test_samples_beyond_the_limit_are_refused_until_others_leave():
    admission = AdmissionControl(3)
    with admission.enter(2):
        error = refusal(admission, 2)
        assert (error.status, error.code) == (429, "queue_full") and error.retry_after >= 1
        with admission.enter():
            assert admission.num_samples == 3
        with pytest.raises(KeyError), admission.enter():
            raise KeyError
        assert admission.num_samples == 2
    assert admission.num_samples == 0


def test_request_that_never_fits_gets_400():
    assert refusal(AdmissionControl(3), 4).status == 400


def test_draining_refuses_all_but_keeps_those_that_are_in():
    admission = AdmissionControl(3)
    with admission.enter():
        admission.draining = True
        assert refusal(admission).status == 503
        assert admission.num_samples == 1
    assert admission.num_samples == 0
