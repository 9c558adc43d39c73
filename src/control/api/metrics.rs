//! `/metrics`.
//!
//! Owns: names, units and help of the metrics, in OpenMetrics text.
//! Does not own: the counting.

use crate::node::service::{NodeInfo, SharedService, VolumeMetrics};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub async fn metrics(State(service): State<SharedService>) -> Response {
    let mut volumes = service.metrics().await;
    volumes.sort_by(|a, b| a.volume.cmp(&b.volume));
    let ready = service.ready().await.is_ok();
    let node = service.node().await.ok();
    ([(header::CONTENT_TYPE, OPENMETRICS)], render(Snapshot { node, ready, volumes })).into_response()
}

fn render(snapshot: Snapshot) -> String {
    let mut registry = Registry::with_prefix("blockhouse");
    registry.register_collector(Box::new(snapshot));
    let mut body = String::new();
    // Encoding into a String cannot fail.
    text::encode(&mut body, &registry).ok();
    body
}

/// All that is told in one scrape.
#[derive(Debug)]
struct Snapshot {
    node: Option<NodeInfo>,
    ready: bool,
    volumes: Vec<VolumeMetrics>,
}

type Number = fn(&VolumeMetrics) -> u64;

/// Counters: name without `_total`, help, unit, value.
const COUNTERS: &[(&str, &str, Option<Unit>, Number)] = &[
    ("volume_read_operations", "Reads answered", None, |v| v.read_ops),
    ("volume_read", "Bytes read by clients", Some(Unit::Bytes), |v| v.read_bytes),
    ("volume_write_operations", "Writes acknowledged", None, |v| v.write_ops),
    ("volume_write", "Bytes written by clients", Some(Unit::Bytes), |v| v.write_bytes),
    ("volume_zero_operations", "Discards and zero writes acknowledged", None, |v| v.zero_ops),
    ("volume_flush_operations", "Flushes acknowledged", None, |v| v.flush_ops),
    ("volume_errors", "Operations that were answered with an error", None, |v| v.errors),
    ("volume_commits", "States put into the pool", None, |v| v.commits),
    ("volume_committed", "Bytes put into the pool", Some(Unit::Bytes), |v| v.committed_bytes),
    ("volume_cold_loads", "Blocks read from the pool because a client waited for them", None, |v| {
        v.cold_loads
    }),
];

type Histogram = fn(&VolumeMetrics) -> &[u64];

const LATENCIES: &[(&str, &str, Histogram)] = &[
    ("volume_read_latency", "Time of reads; the sum is estimated from the buckets", |v| &v.read_latency),
    ("volume_write_latency", "Time of writes; the sum is estimated from the buckets", |v| &v.write_latency),
    ("volume_flush_latency", "Time of flushes; the sum is estimated from the buckets", |v| &v.flush_latency),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encoder
            .encode_descriptor("ready", "1 if the node serves and its pool answers", None, MetricType::Gauge)?
            .encode_gauge(&i64::from(self.ready))?;
        if let Some(node) = &self.node {
            encoder
                .encode_descriptor("build", "Version of the daemon", None, MetricType::Info)?
                .encode_info(&[("version", node.version.as_str()), ("node", node.node_id.as_str())])?;
            encoder
                .encode_descriptor("attached_volumes", "Volumes attached here", None, MetricType::Gauge)?
                .encode_gauge(&gauge(node.attached))?;
        }
        for (name, help, unit, value) in COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for volume in &self.volumes {
                family
                    .encode_family(&labels(volume))?
                    .encode_counter::<NoLabelSet, u64, u64>(&value(volume), None)?;
            }
        }
        self.gauges(&mut encoder)?;
        for (name, help, counts) in LATENCIES {
            let mut family =
                encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
            for volume in &self.volumes {
                let (buckets, sum, count) = buckets(&volume.latency_us_bounds, counts(volume));
                family
                    .encode_family(&labels(volume))?
                    .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

impl Snapshot {
    fn gauges(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut dirty = encoder.encode_descriptor(
            "volume_dirty",
            "Bytes acknowledged and not yet in the pool",
            Some(&Unit::Bytes),
            MetricType::Gauge,
        )?;
        for volume in &self.volumes {
            dirty.encode_family(&labels(volume))?.encode_gauge(&gauge(volume.dirty_bytes))?;
        }
        let mut oldest = encoder.encode_descriptor(
            "volume_oldest_dirty_age",
            "Age of the oldest byte that is acknowledged and not yet in the pool",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for volume in &self.volumes {
            oldest.encode_family(&labels(volume))?.encode_gauge(&seconds(volume.oldest_dirty_ms, 1e3))?;
        }
        let mut last = encoder.encode_descriptor(
            "volume_last_commit_timestamp",
            "When the pool last got a state of the volume, in seconds since 1970",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for volume in &self.volumes {
            if let Some(commit) = volume.last_commit {
                last.encode_family(&labels(volume))?.encode_gauge(&seconds(commit.0, 1e3))?;
            }
        }
        Ok(())
    }
}

fn labels(volume: &VolumeMetrics) -> [(&'static str, &str); 1] {
    [("volume", volume.volume.as_str())]
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn seconds(value: u64, per_second: f64) -> f64 {
    value as f64 / per_second
}

/// Buckets as the encoder wants them (upper bound in seconds, count), an estimate of the sum, and the count of all. Each
/// operation counts as the middle of its bucket, one beyond the last bound as that bound.
fn buckets(bounds_us: &[u64], counts: &[u64]) -> (Vec<(f64, u64)>, f64, u64) {
    let (mut sum, mut all, mut lower) = (0.0, 0u64, 0.0);
    let mut buckets = Vec::with_capacity(bounds_us.len() + 1);
    let beyond = counts.get(bounds_us.len()).copied().unwrap_or(0);
    for (bound, count) in bounds_us.iter().zip(counts) {
        let upper = seconds(*bound, 1e6);
        sum += (lower + upper) / 2.0 * seconds(*count, 1.0);
        all = all.saturating_add(*count);
        buckets.push((upper, *count));
        lower = upper;
    }
    sum += lower * seconds(beyond, 1.0);
    buckets.push((f64::INFINITY, beyond));
    (buckets, sum, all.saturating_add(beyond))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;

    #[test]
    fn metrics_have_units_in_their_names_and_cumulative_buckets() {
        let volume = VolumeMetrics {
            volume: "vm-7".into(),
            write_bytes: 4096,
            dirty_bytes: 512,
            oldest_dirty_ms: 1500,
            last_commit: Some(UnixMillis(2_000)),
            latency_us_bounds: vec![100, 1000],
            read_latency: vec![1, 2, 3],
            ..VolumeMetrics::default()
        };
        let text = render(Snapshot { node: None, ready: true, volumes: vec![volume] });
        for line in [
            "blockhouse_ready 1",
            "# UNIT blockhouse_volume_write_bytes bytes",
            "blockhouse_volume_write_bytes_total{volume=\"vm-7\"} 4096",
            "blockhouse_volume_write_operations_total{volume=\"vm-7\"} 0",
            "blockhouse_volume_dirty_bytes{volume=\"vm-7\"} 512",
            "blockhouse_volume_oldest_dirty_age_seconds{volume=\"vm-7\"} 1.5",
            "blockhouse_volume_last_commit_timestamp_seconds{volume=\"vm-7\"} 2.0",
            "blockhouse_volume_read_latency_seconds_count{volume=\"vm-7\"} 6",
            "blockhouse_volume_read_latency_seconds_bucket{le=\"0.001\",volume=\"vm-7\"} 3",
            "blockhouse_volume_read_latency_seconds_bucket{le=\"+Inf\",volume=\"vm-7\"} 6",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn counts_that_do_not_fit_their_bounds_do_no_harm() {
        assert_eq!(buckets(&[], &[]).2, 0);
        assert_eq!(buckets(&[1, 2], &[1]).2, 1);
        assert_eq!(buckets(&[1], &[u64::MAX, u64::MAX, 5]).2, u64::MAX);
    }
}
