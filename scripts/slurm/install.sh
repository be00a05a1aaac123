#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs SLURM and munge from Debian's packages (3 MB); nothing is started.
set -euo pipefail
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
