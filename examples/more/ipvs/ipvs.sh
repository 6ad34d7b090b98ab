#!/bin/sh
# Sets up IPVS on this machine: connections to VIP are spread over two hosts, whose
# route back goes through this machine (NAT).
#
#   VIP=192.0.2.1:80 HOST1=10.0.1.2:8080 HOST2=10.0.2.2:8080 ./ipvs.sh
#
# To restart the only process of a host, without the handoff, let new connections go
# to the other one first, and back afterwards:
#
#   ipvsadm -e -t VIP -r HOST -m -w 0     # established connections stay
#   ipvsadm -e -t VIP -r HOST -m -w 1
set -eu
sysctl -q -w net.ipv4.ip_forward=1
ipvsadm -A -t "$VIP" -s rr
ipvsadm -a -t "$VIP" -r "$HOST1" -m -w 1
ipvsadm -a -t "$VIP" -r "$HOST2" -m -w 1
