"""launch/kubernetes: what is applied, and that the pods of it find each other by `hosts.find`."""

import pathlib
import re
import subprocess

import pytest
import yaml

from moe_peft.runtime import processes

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "kubernetes"
TRAIN = ["moe-peft", "train", "--gin.MODEL_DIR=/runs/mov", "--gin.X='a \"b\\c: #'"]
WHAT = ["--name", "mov", "--image", "r/i:1", "--claim", "pvc:/runs"]


def run(*arguments, **kwargs):
    return subprocess.run(
        ["bash", str(FOLDER / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def rendered(*flags):
    """The manifest, its job and its pods, as Kubernetes reads them."""
    done = run("--dry_run", *WHAT, *flags, *TRAIN)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    (job,) = manifest["spec"]["replicatedJobs"]
    return manifest, job, job["template"]["spec"]["template"]["spec"]


def environs(manifest, job, pod):
    """Each pod's variables: the manifest's own, and what an indexed job adds."""
    (container,) = pod["containers"]
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    completions = job["template"]["spec"]["completions"]
    return [{**own, "JOB_COMPLETION_INDEX": str(index)} for index in range(completions)]


def host(manifest, job, index):
    """A pod's name in the network, as JobSet documents it."""
    network = manifest["spec"]["network"]
    assert network["enableDNSHostnames"] is True
    return f"{manifest['metadata']['name']}-{job['name']}-0-{index}.{network['subdomain']}"


def test_gpu_pods_find_each_other():
    manifest, job, pod = rendered("--gpu", "3")
    first = f"{host(manifest, job, 0)}:8476"
    assert [processes.find(None, environ) for environ in environs(manifest, job, pod)] == [
        processes.Cluster("the Kubernetes job", first, 3, index) for index in range(3)
    ]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}


@pytest.mark.parametrize("flags", [["--gpu", "1"], ["--tpu", "v5e:2x2"]])
def test_one_pod_is_alone(flags):
    manifest, job, pod = rendered(*flags)
    (environ,) = environs(manifest, job, pod)
    assert processes.find(None, {**environ, "TPU_WORKER_HOSTNAMES": "localhost"}) is None


@pytest.mark.parametrize(
    ("flags", "accelerator", "topology", "nodes", "chips"),
    [
        (["v5e:1x1"], "tpu-v5-lite-podslice", "1x1", 1, 1),
        (["v5e:2x4", "--chips_per_node", "8"], "tpu-v5-lite-podslice", "2x4", 1, 8),
        (["v5e:4x4"], "tpu-v5-lite-podslice", "4x4", 4, 4),
        (["v5e:16x16"], "tpu-v5-lite-podslice", "16x16", 64, 4),
        (["v6e:8x8"], "tpu-v6e-slice", "8x8", 16, 4),
        (["v4:2x2x4"], "tpu-v4-podslice", "2x2x4", 4, 4),
        (["v5p:4x4x4"], "tpu-v5p-slice", "4x4x4", 16, 4),
    ],
)
def test_tpu_slices(flags, accelerator, topology, nodes, chips):
    manifest, job, pod = rendered("--tpu", *flags)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == nodes
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    if nodes > 1:
        # GKE tells the pods of a slice who they are.
        names = ",".join(host(manifest, job, index) for index in range(nodes))
        for environ in environs(manifest, job, pod):
            found = processes.find(None, {**environ, "TPU_WORKER_HOSTNAMES": names})
            assert found == processes.Cluster("TPU_WORKER_HOSTNAMES")


def test_several_slices_keep_to_a_node_pool_each():
    manifest, job, _ = rendered("--tpu", "v5e:4x4", "--slices", "2")
    assert job["replicas"] == 2
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


# The fields used, as the definitions of JobSet v1alpha2, Job v1 and Pod v1 have them.
FIELDS = {
    "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
    "metadata": {"name": str, "namespace": str},
    "spec": {"network": dict, "failurePolicy": dict, "replicatedJobs": list},
    "network": {"enableDNSHostnames": bool, "subdomain": str},
    "failurePolicy": {"maxRestarts": int, "rules": list},
    "replicatedJob": {"name": str, "replicas": int, "template": dict},
    "job": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "podFailurePolicy": dict,
        "template": dict,
    },
    "pod": {
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "nodeSelector": dict,
        "tolerations": list,
        "containers": list,
        "volumes": list,
    },
    "container": {
        "name": str,
        "image": str,
        "command": list,
        "env": list,
        "resources": dict,
        "volumeMounts": list,
    },
}


def test_fields():
    flags = ["--gpu", "2", "--namespace", "true", "--service_account", "sa", "--grace", "30"]
    manifest, replicated, pod = rendered(*flags, "--spot", "--max_restarts", "5")
    (container,) = pod["containers"]
    spec, job = manifest["spec"], replicated["template"]["spec"]
    found = {
        "": manifest,
        "metadata": manifest["metadata"],
        "spec": spec,
        "network": spec["network"],
        "failurePolicy": spec["failurePolicy"],
        "replicatedJob": replicated,
        "job": job,
        "pod": pod,
        "container": container,
    }
    types = lambda fields: {key: type(value) for key, value in fields.items()}
    assert {place: types(fields) for place, fields in found.items()} == FIELDS

    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"] == {"name": "mov", "namespace": "true"}
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert pod["restartPolicy"] == "Never"  # As a pod failure policy demands.
    assert pod["terminationGracePeriodSeconds"] == 30
    assert pod["serviceAccountName"] == "sa"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert container["command"] == [*TRAIN, "--distributed_timeout", "1800"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"runs": "/runs", "shm": "/dev/shm"}
    assert pod["volumes"][0] == {"name": "runs", "persistentVolumeClaim": {"claimName": "pvc"}}


def test_what_is_restarted_and_what_is_not():
    manifest, replicated, pod = rendered("--gpu", "2")
    (job_rule,) = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    assert job_rule == {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": pod["containers"][0]["name"],
            "operator": "In",
            "values": [2],
        },
    }
    assert manifest["spec"]["failurePolicy"] == {
        "maxRestarts": 20,
        "rules": [
            {
                "name": "mistake",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }


def test_own_labels_and_time_out():
    labels = ["--node_selector", "gpu=h100", "--node_selector", "pool=a"]
    done = run("--dry_run", *WHAT, "--gpu", "2", *labels, *TRAIN, "--distributed_timeout=60")
    assert "1800" not in done.stdout
    *_, pod = rendered("--gpu", "2", *labels)
    assert pod["nodeSelector"] == {"gpu": "h100", "pool": "a"}


def test_applies_what_the_dry_run_prints(stand_ins):
    stand_ins.add("kubectl", 'cat >"$here/applied"')
    flags = [*WHAT, "--namespace", "n", "--gpu", "2"]
    done = run(*flags, *TRAIN, env=stand_ins.environ())
    assert done.returncode == 0, done.stderr
    assert stand_ins.calls == ["kubectl apply --filename=-"]
    first, *printed = run("--dry_run", *flags, *TRAIN).stdout.splitlines()
    assert first == "# kubectl apply --filename=- <<END"
    assert (stand_ins.folder / "applied").read_text().splitlines() == printed
    assert "kubectl delete jobset --namespace=n mov" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*WHAT, *TRAIN], "expected one of --gpu NODES and --tpu TYPE:TOPOLOGY"),
        ([*WHAT, "--gpu", "2", "--tpu", "v5e:4x4", *TRAIN], "expected one of --gpu NODES and"),
        ([*WHAT, "--gpu", "0", *TRAIN], "--gpu is '0'; expected a number of nodes"),
        ([*WHAT, "--tpu", "v5e:16", *TRAIN], "--tpu is 'v5e:16'; expected v5e:AxB"),
        ([*WHAT, "--tpu", "v5p:4x4", *TRAIN], "--tpu is 'v5p:4x4'; expected v5e:AxB"),
        ([*WHAT, "--tpu", "v5e:4x4", "--chips_per_node", "5", *TRAIN], "divides the 16 chips"),
        ([*WHAT[2:], "--gpu", "2", *TRAIN], "--name is missing"),
        ([*WHAT, "--name", "Mov_1", "--gpu", "2", *TRAIN], "--name is 'Mov_1'; expected"),
        ([*WHAT, "--claim", "pvc", "--gpu", "2", *TRAIN], "--claim is 'pvc'; expected"),
        ([*WHAT, "--claim", "pvc:/r", "--gpu", "2", *TRAIN], "MODEL_DIR is /runs/mov, which is"),
        ([*WHAT, "--gpu", "2", "moe-peft", "train", "--gin.MODEL_DIR=gs://b/r"], "plain files"),
        ([*WHAT, "--node_selector", "x", "--gpu", "2", *TRAIN], "--node_selector is 'x'"),
        ([*WHAT, "--gpu", "2", "--grace", "2m", *TRAIN], "--grace is '2m'; expected a whole"),
        ([*WHAT, "--gpus", "2", *TRAIN], "unknown flag --gpus"),
        (WHAT, "Trains on Kubernetes"),
    ],
)
def test_mistakes(arguments, message, stand_ins):
    stand_ins.add("kubectl")
    done = run(*arguments, env=stand_ins.environ())
    assert done.returncode == 2
    assert message in done.stderr
    assert not stand_ins.calls


def test_the_image_copies_what_the_installation_needs():
    root = FOLDER.parents[1]
    copies = re.findall(r"^COPY (.*) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copies for name in line.split()}
    assert all((root / name).exists() for name in names)
    assert {"setup.py", "pyproject.toml", "README.md", "moe_peft", "tasks", "gin"} <= names
