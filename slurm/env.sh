# Sourced by slurm/train.sh: which Python runs the ranks, and the environment they get.
#
#     VENV              a virtual environment with this project (default: .venv of the project)
#     CONTAINER_IMAGE   instead: a .sif file, run by apptainer, or what pyxis takes (a .sqsh file or
#                       registry#image)
#     CONTAINER_MOUNTS  more folders that the container needs, such as the data: SOURCE:TARGET,...
#
# What your cluster's network needs, such as NCCL_SOCKET_IFNAME or NCCL_IB_HCA, belongs in the
# environment of sbatch, from where the ranks have it.
# shellcheck shell=bash disable=SC2034,SC2154 # train.sh sets $project and reads the arrays

container=() # options of srun
python=("${VENV:-$project/.venv}/bin/python" -u)
mounts="$project:$project,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
case ${CONTAINER_IMAGE:-} in
    '')
        [[ -x ${python[0]} ]] || fail "there is no ${python[0]}; make the environment or set VENV"
        ;;
    *.sif) python=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE" python -u) ;;
    *)
        container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts")
        container+=(--container-workdir="$PWD")
        python=(python -u)
        ;;
esac

# The code of the folder that was submitted, whatever the environment or the image has installed.
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
# Ranks and data workers are as many as there are CPUs; more threads would take turns on them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One queue per GPU keeps communication ahead of the GEMM it overlaps with.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Numbers of images, and so sizes of tensors, change from one micro-batch to the next.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# The reason of a network fault stands in the log of the rank that had it.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
