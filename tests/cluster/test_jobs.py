"""Jobs: ids, exit codes and refusals that need no cluster."""

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus

from ray_synth.cluster import jobs as submit


def job(status, **fields):
    return JobDetails(
        type="SUBMISSION", submission_id="mine-1", status=status, entrypoint="true", **fields
    )


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_exit_code_is_the_jobs_own(status, code, expected):
    assert submit.exit_code(job(status, driver_exit_code=code)) == expected


def test_why_a_job_failed_is_said_where_its_log_does_not():
    failed = job(JobStatus.FAILED, error_type="RUNTIME_ENV_SETUP_FAILURE", message="no such file")
    assert "no such file" in submit.outcome(failed)
    own = job(
        JobStatus.FAILED,
        error_type="JOB_ENTRYPOINT_COMMAND_ERROR",
        message="the log",
        driver_exit_code=2,
    )
    assert submit.outcome(own) == "job mine-1: FAILED, exit code 2"


def test_ids_are_numbered_by_run():
    assert submit.next_id("mine", []) == "mine-1"
    taken = ["mine-1", "mine-12", "mine-other-40", "raysubmit_99", "mine-x", "other-50"]
    assert submit.next_id("mine", taken) == "mine-13"


def test_arguments_are_quoted_for_the_shell():
    command = submit.entrypoint("run", ["--set", "prompting.mix={plain: 1}; rm -rf x"])
    assert command.endswith("run --set 'prompting.mix={plain: 1}; rm -rf x'")


@pytest.mark.parametrize(
    "word", ["s3://KEY:hush@bucket/run", "meaning.llm.base_url=https://host/v1?api_key=hush"]
)
def test_a_secret_in_an_argument_is_refused_as_the_dashboard_shows_it(word):
    with pytest.raises(ValueError, match="pass that on with --env NAME") as error:
        submit.entrypoint("report", ["--run", word])
    assert "hush" not in str(error.value)


def test_variables_are_passed_by_name_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert submit.passed_on(["HF_TOKEN"]) == {"HF_TOKEN": "hf_secret"}
    with pytest.raises(ValueError, match="no such variable here") as missing:
        submit.passed_on(["WANDB_KEY"])
    assert "WANDB_KEY" in str(missing.value)
    with pytest.raises(ValueError, match="give the name alone") as given:
        submit.passed_on(["HF_TOKEN=hf_secret"])
    assert "hf_secret" not in str(given.value)
    with pytest.raises(ValueError, match="sets it on the cluster itself"):
        submit.passed_on(["OMP_WAIT_POLICY"])


def test_a_refusal_hides_the_users_variables():
    error = RuntimeError("Request failed:\nValueError: bad runtime_env {'HF_TOKEN': 'hf_secret'}\n")
    assert submit._refusal(error, {"HF_TOKEN": "hf_secret"}).endswith("{'HF_TOKEN': '***'}")


def test_another_minor_version_of_ray_is_refused():
    submit.check_ray_version("2.60.0", "2.60.3")
    with pytest.raises(ValueError, match=r"the cluster runs Ray 2.59.1, and this is Ray 2.60.0"):
        submit.check_ray_version("2.60.0", "2.59.1")


def test_the_address_is_a_dashboards(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the GCS: not where jobs go
    assert submit.find_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert submit.find_address(None) == "http://head:8265"
    assert submit.find_address("https://other") == "https://other"
    with pytest.raises(ValueError, match="jobs go to the cluster's dashboard"):
        submit.find_address("ray://head:10001")
