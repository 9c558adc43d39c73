#!/usr/bin/env bash
# Runs in the server's own root folder, as the first process of its own: everything here ends with it.
# Takes HTTP_PORT, HTTPS_PORT, MON_PORT, MON_PORT_V1; /mnt is shared with the starter.
set -e
# As process one it gets only the signals that it asked for.
trap 'exit 143' TERM INT
D=/run/s3
mkdir -p $D/mon $D/osd $D/mgr $D/log $D/run /etc/ceph
FSID=$(cat /proc/sys/kernel/random/uuid)
cat >$D/ceph.conf <<C
[global]
fsid = $FSID
mon_host = [v2:127.0.0.1:$MON_PORT,v1:127.0.0.1:$MON_PORT_V1]
# Without cephx the manager does not start.
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
ms_bind_ipv4 = true
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_crit = 1
mon_pg_warn_min_per_osd = 0
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
osd_memory_target = 1073741824
memstore_device_bytes = 8589934592
keyring = $D/keyring
mon_data = $D/mon
osd_data = $D/osd
mgr_data = $D/mgr
log_file = $D/log/\$name.log
admin_socket = $D/run/\$name.asok
pid_file = $D/run/\$name.pid
run_dir = $D/run
# Without tcp_nodelay each small reply waits 40 ms.
rgw_frontends = beast endpoint=127.0.0.1:$HTTP_PORT ssl_endpoint=127.0.0.1:$HTTPS_PORT ssl_certificate=$D/tls.pem ssl_private_key=$D/tls.key tcp_nodelay=1
rgw_data = $D/rgw
rgw_dynamic_resharding = false
C
export CEPH_CONF=$D/ceph.conf

openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=blockhouse tests" -keyout $D/ca.key -out $D/ca.pem
openssl req -newkey rsa:2048 -nodes -subj "/CN=127.0.0.1" -keyout $D/tls.key -out $D/tls.csr
openssl x509 -req -in $D/tls.csr -CA $D/ca.pem -CAkey $D/ca.key -CAcreateserial -days 3650 -out $D/tls.pem \
  -extfile <(printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n')
cp $D/ca.pem /mnt/ca.pem

K=$D/keyring
ceph-authtool -C $K --gen-key -n mon. --cap mon 'allow *'
ceph-authtool $K --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' --cap mds 'allow *'
ceph-authtool $K --gen-key -n client.rgw --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ceph-authtool $K --gen-key -n osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *'
ceph-authtool $K --gen-key -n mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *'
monmaptool --create --fsid "$FSID" --addv a "[v2:127.0.0.1:$MON_PORT,v1:127.0.0.1:$MON_PORT_V1]" $D/monmap
ceph-mon --mkfs -i a --monmap $D/monmap --keyring $K
ceph-mon -f -i a &
cat /proc/sys/kernel/random/uuid >$D/osd.uuid
timeout 60 ceph osd new "$(cat $D/osd.uuid)"
ceph-osd -i 0 --mkfs --osd-uuid "$(cat $D/osd.uuid)"
ceph-osd -f -i 0 &
for _ in $(seq 60); do timeout 10 ceph osd stat | grep -q '1 up' && break; sleep 0.5; done
# Pools of the gateway come up only with a manager.
ceph-mgr -f -i x &
for _ in $(seq 60); do timeout 10 ceph -s 2>/dev/null | grep -q 'x(active' && break; sleep 0.5; done
radosgw -f -n client.rgw &
for _ in $(seq 120); do (echo >"/dev/tcp/127.0.0.1/$HTTP_PORT") 2>/dev/null && break; sleep 0.5; done
timeout 60 radosgw-admin -n client.rgw user create --uid=test --display-name=test --access-key=test --secret=testtest
touch /mnt/ready
wait -n
echo "one of the servers ended"
